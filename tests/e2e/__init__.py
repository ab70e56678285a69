"""The real demo model behind a real server process. A package, so that the server can be shared by all of its modules."""
