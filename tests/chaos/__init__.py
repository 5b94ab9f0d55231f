"""The chaos run: everything goes wrong at once, the daemon is killed at random, and must end up right.

``python -m tests.chaos --seed N [--accounts 200] [--minutes M | --commits N] [--seeds 20]``: a lying network
of two relays and three PDSes in this process, the daemon in others, a subscriber, and a verdict on all that
is left when the weather has calmed down.
"""
