"""What people judged: the one form of a judgment, snapshots of them, how far they agree, and other tools' formats."""
