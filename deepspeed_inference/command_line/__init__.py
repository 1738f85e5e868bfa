"""The main job: prompts in, answers out."""
