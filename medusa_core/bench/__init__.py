"""`medusa bench`: what this engine, or any OpenAI-compatible server, does per second on this machine, and how sure that is.

Import nothing here: the load processes of the server benchmark start in a fresh interpreter and need no torch.
"""
