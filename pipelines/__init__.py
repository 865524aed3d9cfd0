"""The methods, without a host: torch and a few well-kept libraries."""
