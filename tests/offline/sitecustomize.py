"""Python imports this at the start of every process of the tests: connections may only go to this machine."""
import errno
import socket

connect, connect_ex, sendto, getaddrinfo = (
    socket.socket.connect, socket.socket.connect_ex, socket.socket.sendto, socket.getaddrinfo)


def refuse_remote(host) -> None:
    "Raise what a machine without a network raises, unless `host` is this machine."
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "localhost", "::1", "::", "0.0.0.0") and not host.startswith("127."):
        raise OSError(errno.ENETUNREACH, f"the network is off in the tests; something asked for {host}")


def guarded(function):
    "Check the address, the last argument, before the call; a Unix socket's address is no tuple."
    def call(self, *arguments):
        if isinstance(arguments[-1], tuple):
            refuse_remote(arguments[-1][0])
        return function(self, *arguments)
    return call


def local_getaddrinfo(host, *arguments, **options):
    "Look up this machine's names only."
    refuse_remote(host)
    return getaddrinfo(host, *arguments, **options)


socket.socket.connect, socket.socket.connect_ex = guarded(connect), guarded(connect_ex)
socket.socket.sendto, socket.getaddrinfo = guarded(sendto), local_getaddrinfo
