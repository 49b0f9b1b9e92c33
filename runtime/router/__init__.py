"""The router: `router` computes (gates, trunk, batcher, engine, dispatch), `server` answers links with it, and
`client` is a gateway's end: a backend over links that goes on at another router when one dies."""
