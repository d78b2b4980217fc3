import urllib.request

import trio

from hbone.testing import Mesh, memory_session


def ask_through_a_pair(app_port):
    with Mesh() as mesh:
        pair = mesh.pair(app_port, client="shop/cart", server="shop/web")
        with urllib.request.urlopen(pair.url) as answer:
            return answer.read()


async def ask_in_memory():
    async with memory_session("echo") as session:
        async with await session.client.open_tunnel("10.0.0.7:5432") as tunnel:
            await tunnel.send_all(b"hello")
            return await tunnel.receive_some()


if __name__ == "__main__":
    print(trio.run(ask_in_memory))
