"""The main job: training the multimodal image generator on real data."""


class UserError(Exception):
    """What the user asked for cannot be done; the message is one line that says what to do."""
