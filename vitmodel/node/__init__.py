"""A DICOM node: receive studies, score them once they are complete, and send the results back to the PACS.

The stages share nothing but the database (`models`) and the folder of received files, so that each can run in a process
or on a machine of its own: `receiving` -> `gathering` -> `scoring` -> `sending`.
"""
