"""A whole run: settings, folder, steps."""
