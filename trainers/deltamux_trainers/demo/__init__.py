"""The demo: a small base model, three tenants' tasks, and the program that trains, serves and swaps their adapters."""
