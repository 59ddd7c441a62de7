"""What the constraint costs, in audits that need no GPU and in timings, and what it keeps, in the study."""
