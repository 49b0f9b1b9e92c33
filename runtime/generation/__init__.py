"""Generation: `sampler` chooses tokens, `scheduler` decides which sequences advance, `engine` runs steps."""
