"""Talk to models: what a run holds, answers token by token, and a session of commands around them."""
