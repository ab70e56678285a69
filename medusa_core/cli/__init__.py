"""The `medusa` command line."""
