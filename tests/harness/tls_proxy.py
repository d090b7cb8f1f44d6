"""A TLS port before a server's socket.

Usage: ``python tests/harness/tls_proxy.py CERTIFICATE KEY ADDRESS PORT SOCKET``.

The embedded Valkey server is built without TLS, so tests put this before it. It imports nothing of hetrain.
"""

from __future__ import annotations

import asyncio
import ssl
import sys

_PIECE = 1 << 18


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_PIECE):
        writer.write(data)
        await writer.drain()


async def main(certificate: str, key: str, address: str, port: int, path: str) -> None:
    """Serves until it is killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(path)
        pumps = [
            asyncio.create_task(_pump(reader, server_writer)),
            asyncio.create_task(_pump(server_reader, writer)),
        ]
        # When one direction ends, the other has no peer left.
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for end in (writer, server_writer):
            end.transport.abort()

    server = await asyncio.start_server(serve, address, port, ssl=context, backlog=256)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5]))
