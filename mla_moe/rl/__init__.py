"""Reinforcement learning from rule rewards: tasks, prompts, rewards and the processes that judge."""
