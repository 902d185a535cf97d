"""expecttest, where it is not installed: as much as importing torch.testing's databases needs."""

import unittest

TestCase = unittest.TestCase
