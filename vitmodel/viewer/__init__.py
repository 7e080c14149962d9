"""The reading room: a worklist and an exam page with four views, for results on disk or in a node's database."""
