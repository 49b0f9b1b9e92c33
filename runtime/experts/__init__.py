"""Expert groups: `layers` are the experts of one layer, `group` holds them and computes partial sums, `server`
and `client` are a group's two ends of a link, `process` runs one as a local process of its own."""
