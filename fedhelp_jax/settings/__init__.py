"""How a setting is declared: its type, default, help and check, and what it needs to matter."""
