"""How it runs: serving and training engines, and the thin Ray actors around them."""
