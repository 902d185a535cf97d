"""`mmfast bench`: what mmfast gains on this machine, measured side by side, next to the machine's own floor."""
