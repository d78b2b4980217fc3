"""What the tests stand on: throw-away certificates, a hand-made HTTP/2 peer, and real foreign peers.

Nothing in here imports the product, so a fault of the product cannot hide in its own test kit.
"""
