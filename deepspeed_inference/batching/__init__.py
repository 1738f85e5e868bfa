"""Many requests at once: prompts in pieces, one batch that requests join and leave."""
