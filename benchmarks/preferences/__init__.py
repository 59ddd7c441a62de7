"""DPO on preference pairs and GRPO on a rule-based reward: what they do to refusals, constrained and not."""
