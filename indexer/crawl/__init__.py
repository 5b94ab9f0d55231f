"""Discovery: which accounts there are, from the lists of relays, collection directories and PDSes.

What a list says is a hint: it queues a fetch, which proves what it finds, or a question to the account's PDS.
"""
