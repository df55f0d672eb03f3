"""The official packages behind the interface of rewards, for the interpreter of an environment that has them.

`rewards.isolated_worker` imports these modules there; here they are named, never imported.
"""
