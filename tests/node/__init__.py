"""Tests of the node. A package, so that its conftest.py is not taken for that of all tests."""
