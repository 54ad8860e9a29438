mod error; mod hash; mod source;
