"""Generation: `rules` say what a request may ask and where it ends, `sampler` chooses tokens, `scheduler` decides
which sequences advance, `engine` runs steps."""
