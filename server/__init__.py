"""The live server: a page where a prompt becomes a video that changes while it plays. Needs the extra `serve`.

`engine` makes the videos and knows no sockets, `app` is the web side, `page/` what a browser loads.
"""
