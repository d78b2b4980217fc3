"""A node in a program: the program says what the mesh is, and changes it."""

import sys

from hbone.mesh import parse_mesh
from hbone.proxy import ListenAddress, Node, NodeConfig
from hbone.telemetry import AccessLog

ANY_PORT = ListenAddress("127.0.0.1", 0)

MESH = """
workloads:
- name: web-0
  namespace: shop
  serviceAccount: web
  workloadIps: ["127.0.0.1"]
  protocol: HBONE
  services:
    shop/web.shop.svc.cluster.local: {{80: {port}}}
services:
- name: web
  namespace: shop
  hostname: web.shop.svc.cluster.local
  vips: ["/10.96.0.20"]
  ports: {{80: {port}}}
"""

CLOSED = """
policies:
- name: closed
  namespace: shop
  scope: Namespace
  action: Deny
  dryRun: false
  rules:
  - - - destinationPorts: [{port}]
"""


async def with_a_node(port, ca_dir, use):
    """Serve the application on a port as http://web.shop.svc.cluster.local/ to whoever uses the node's proxies."""
    config = NodeConfig(
        fake_ca=True,
        ca_dir=ca_dir,
        inbound=ANY_PORT,
        hbone_port=0,  # the nodes of this mesh are where we are
        http_proxy=ANY_PORT,
        socks5=None,
        outbound=None,
        plaintext=None,
        admin=None,
        stats=None,
        readiness=None,
    )
    mesh = parse_mesh(MESH.format(port=port)).snapshot()
    async with AccessLog(sys.stdout.buffer) as access_log, Node(config, mesh=mesh, access_log=access_log) as node:
        await node.ready.wait()
        (proxy,) = node.addresses["http proxy"]
        await use(node, proxy)
        await node.drain()


def close_the_shop(node, port):
    """One more policy, in force when this returns; connections that it denies are closed, those that are open too."""
    policies = parse_mesh(CLOSED.format(port=port)).policies
    node.mesh.replace(node.mesh.snapshot.with_changes(upsert=policies))
