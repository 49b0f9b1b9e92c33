"""pimoe.runtime: batching, caching, routing, links, expert groups and generation. No Ray, no HTTP.

Import what you need from its module (`from pimoe.runtime.local import LocalRuntime`): this file imports
nothing, so that a process which only needs links or errors does not pay for torch.
"""

__version__ = "0.1.0"
