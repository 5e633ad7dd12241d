"""The bundled model, as data; examples/train_demo_model.py made it."""
