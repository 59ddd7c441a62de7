"""What the constraint costs: audits that need no GPU, and measurements."""
