"""Reinforcement learning from rule rewards: tasks, rollouts, rewards, objectives and the learner."""
