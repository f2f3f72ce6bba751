"""Limits of a local server: accepted Host headers, and the number of connections."""

from __future__ import annotations

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MOST_CONNECTIONS, FILES = 256, 1024


def names_this_machine(host: str) -> bool:
    """Whether a request's Host header names this machine, such as localhost.

    A server on localhost refuses other names. Otherwise a foreign web page could make the browser send requests to this
    server under the page's own name (DNS rebinding).
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.strip().lower() in LOCAL_HOSTS


def connection_limit() -> int:
    """The maximum number of connections of a server: a quarter of the files that this process may open. If the system's
    default is low (macOS), the file limit is raised first. The other files are for reading data and for connections
    that wait."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return MOST_CONNECTIONS
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < FILES:  # unlimited values are negative
        files = FILES if most < 0 else min(FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return MOST_CONNECTIONS if files < 0 else min(MOST_CONNECTIONS, files // 4)
