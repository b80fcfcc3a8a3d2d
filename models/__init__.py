"""Plain modules, and each family's configuration."""
