"""The layers a TreeVAE is made of, each a small module of its own."""
