"""Weights and packages by name: repositories of the Hugging Face hub, its mirrors and its cache."""
