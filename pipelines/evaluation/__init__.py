"""How well an edit went: measures against a known answer, and bounds on their means."""
