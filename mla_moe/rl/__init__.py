"""Reinforcement learning from rule rewards: questions, rewards, sampled answers, and what is learned from them."""
