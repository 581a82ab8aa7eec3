"""Writing and reading adapters."""
