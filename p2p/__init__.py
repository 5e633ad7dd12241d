"""The network: libp2p host, frames, gossip, invites. The only package that imports libp2p.

Nothing is imported here, so that invites and addresses can be checked without loading libp2p.
"""
