"""The sub-commands of `cat-rs`: each a dataclass of settings and a function that runs them."""
