"""Look at records before training on them: what they hold, and what is wrong with them."""
