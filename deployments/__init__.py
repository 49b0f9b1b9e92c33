"""pimoe.deployments: the application on Ray Serve. The only part of pimoe that imports Ray."""
