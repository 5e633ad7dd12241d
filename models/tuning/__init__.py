"""What a client adds to frozen blocks: low-rank matrices and prompts."""
