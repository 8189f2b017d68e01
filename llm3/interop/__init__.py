"""Models of others: Hugging Face folders read into canonical parameters, and written from them.

`families` holds a plugin for each family. `folder` reads, `write` writes; both go through the table of the family.
"""
