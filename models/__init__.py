"""Models on torch: configuration, checkpoints, blocks, caches, sampling, text.

Nothing here imports trio or libp2p. `config`, `checkpoint`, `tokenizer` and `text` do not import
torch either, so that whatever is wrong with a model is said before torch is loaded.
"""
