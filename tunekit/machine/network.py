"""What a server may take from the network: requests that name this machine, and so many connections."""

from __future__ import annotations

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MOST_CONNECTIONS, FILES = 256, 1024


def names_this_machine(host: str) -> bool:
    """Whether a request's Host header names this machine.

    A server that listens here alone answers no other name: a page from elsewhere can make the browser ask the name of
    its own server, once that name leads here (DNS rebinding).
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.strip().lower() in LOCAL_HOSTS


def connection_limit() -> int:
    """How many connections a server may hold: a quarter of the files that this process may open, for which macOS has
    to be asked for more. Others are open too: new connections that nobody has looked at yet."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return MOST_CONNECTIONS
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < FILES:  # no limit is below 0
        files = FILES if most < 0 else min(FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return MOST_CONNECTIONS if files < 0 else min(MOST_CONNECTIONS, files // 4)
